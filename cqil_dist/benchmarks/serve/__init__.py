"""Measures any OpenAI-compatible server under load, from outside, as its clients see it.

Knows the address, HTTP and time; nothing of engines, plans or models, so that cqil's service and
others are measured by the same program.

    load, prompts      the requests, and the rate at which they are sent
    target             the server's address, TLS and API key
    stream             one request: its answer's bytes and their times, and how they are read
    run                many requests, each sent when due, with a limit on how many at once
    measure            the whole measurement: runs of each limit, taking turns
    summary, tables    the figures of the report, and their tables on a terminal
"""
