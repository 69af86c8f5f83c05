"""What is sent to a judge: messages and how its reply is generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class JudgeRequest:
    """One request.

    Args:
        user: what the judge is asked.
        system: what it is told first, "" for nothing.
        temperature: 0 for the likeliest reply.
        max_tokens: of the reply.
    """

    user: str
    system: str = ""
    temperature: float = 0.0
    max_tokens: int = 1024

    def messages(self) -> list[dict[str, Any]]:
        """In the form of OpenAI's chat completions."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, {"role": "user", "content": self.user}]
