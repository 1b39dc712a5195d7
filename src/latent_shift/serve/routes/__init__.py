"""The HTTP API: one router for videos, one for images, one for the server itself.

Routes that touch the disk are plain functions, which Starlette runs in threads; the others are coroutines.
"""

from latent_shift.serve.routes import images, server, videos

ROUTERS = (videos.router, images.router, server.router)
