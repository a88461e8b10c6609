"""The routes, one file a group. Each has `router(service)`; `app.py` lists them."""
