"""The OpenAI API's completions and chat completions, over a generation service.

schema.py says what may be asked and what is answered, requests.py turns what is asked into the
service's requests, answers.py turns what comes back into answers, routes.py joins them.
"""
