"""The OpenAI API's completions and chat completions, over a generation service.

schema.py has the bodies of requests and responses, requests.py turns a request into the service's
own requests, answers.py turns their chunks and completions into responses, routes.py joins them.
"""
