"""The environment that Ray's own processes get wherever Herder starts them."""

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray lowers its workers' priority, but only when they have imported it: until then, a new actor takes a core from
    # all that serve, and streams stall.
    "RAY_worker_niceness": "0",
    # Serve's replicas look through their counters for Ray's metrics at this interval, by default ten times a second.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    # What an actor needs is there when it is created, and came by threads that give way.
    "RAY_preload_python_modules": "actors.preload",
}

# For processes with more OpenMP threads than cores among them. libgomp lets an idle thread spin for milliseconds, on a
# core that another process' thread waits for; asleep, as by OMP_WAIT_POLICY=passive, it is late by what a wake takes,
# some 25 us on a virtual machine, at each of a step's hundred pieces of work. It spins about as long as that.
SHARED_CORES = {"GOMP_SPINCOUNT": "2000"}
