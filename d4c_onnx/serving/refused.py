"""What a request is told that cannot be served: a status and one sentence, as JSON."""

from starlette.responses import JSONResponse


class Refused(Exception):
    """A request that is answered with a status of 4xx, or 503.

    Attributes:
        status: HTTP's.
        why: one sentence.
    """

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {"Retry-After": "1"} if self.status == 503 else {}
        if self.status in (408, 413):  # the rest of the body is not read
            headers["Connection"] = "close"
        return JSONResponse({"error": self.why}, self.status, headers)
