"""Measures any OpenAI-compatible address under load, from outside, as its clients see it.

Knows the address, HTTP and time; nothing of engines, plans or models, so that our service and its
peers are measured by the same program.

    prompts, arrivals      what is asked, and when
    peer, request_form     who answers, and in which fields it is asked
    recording              one request: bytes and their times, nothing interpreted
    answer                 what the bytes said, and the latencies in them; after the run
    run, attention         many requests, a bound on how many at once; how attentive this client was
    measure                the whole measurement: bounds taking turns
    summary, tables        figures for the report, and how they look on a terminal
"""
