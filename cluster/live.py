"""What of a deployment may change while it runs: Serve's `user_config`, and never a reason to restart an actor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.config import BalanceConfig, DeploymentConfig
from cluster.config_errors import ConfigError, sentences


class LiveSettings(BaseModel):
    """`log_level` and `balance` as in DeploymentConfig; `max_waiting` is its engine.max_waiting."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    max_waiting: Annotated[int, Field(ge=0)] = 1024
    balance: BalanceConfig = BalanceConfig()

    @classmethod
    def of(cls, config: DeploymentConfig) -> Self:
        """Those that the deployment starts with."""
        return cls(log_level=config.log_level, max_waiting=config.engine.max_waiting, balance=config.balance)

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        """From Serve's `user_config`. Raises ConfigError with every fault found."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problems = [problem for fault in error.errors() for problem in sentences(fault, cls)]
            raise ConfigError([f"user_config: {problem}" for problem in problems]) from None

    def over(self, config: DeploymentConfig) -> DeploymentConfig:
        """The deployment under these settings."""
        engine = config.engine.model_copy(update={"max_waiting": self.max_waiting})
        return config.model_copy(update={"log_level": self.log_level, "engine": engine, "balance": self.balance})
