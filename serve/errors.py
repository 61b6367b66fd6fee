"""`ApiError`: an answer other than success, with its HTTP status and a code for programs."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import FlashcocosError


class ApiError(FlashcocosError):
    """A request that is not done.

    Attributes:
        status: HTTP status.
        code: one word for programs, as docs/serving.md lists them.
        retry_after: seconds after which the same request may succeed, for 429 and 503.
        headers: further ones of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after, self.headers = status, code, retry_after, headers or {}
