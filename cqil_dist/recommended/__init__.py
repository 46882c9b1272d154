"""Plans that come with the package, and how to read what is recorded with a plan."""
