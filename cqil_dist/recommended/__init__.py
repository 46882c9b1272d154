"""Plans that come with the package, found by measurement, and what is written of them."""
