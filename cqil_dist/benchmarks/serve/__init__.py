"""Measures any OpenAI-compatible address under load, from outside, as its clients see it.

Knows the address, HTTP and time; nothing of engines, plans or models, so that our service and
others are measured by the same program.

    load, prompts      what is asked, and how fast
    target             the address, and what it takes to be let in
    stream             one request: bytes and their times, then what they said
    run                many requests, each when it is due, and a bound on how many at once
    measure            the whole measurement: bounds taking turns
    summary, tables    figures for the report, and how they look on a terminal
"""
