"""The environment that Ray's own processes get wherever Herder starts them."""

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray lowers its workers' priority, but only when they have imported it: until then, a new actor takes a core from
    # all that serve, and streams stall.
    "RAY_worker_niceness": "0",
}
