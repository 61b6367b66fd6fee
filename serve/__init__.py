"""The HTTP service: `build_app` makes an ASGI app over an `Engine`, and `flashcocos serve` runs it with uvicorn.

A request passes app.py (who may ask what), batcher.py (how much at once), engine.py (the model) and wire.py (bytes from
and to the network). `client.py` is for callers, and needs nothing of the rest.
"""
