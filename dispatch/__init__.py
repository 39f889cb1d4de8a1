"""Tokens to experts and back: routing (pure), local (the oracle), groups, lockstep, all_to_all."""
