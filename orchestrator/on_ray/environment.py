"""Environment variables: those that Ray is started with, and those of the driver that every node gets.

Every process of a trial loads this file, so it imports next to nothing.
"""

from collections.abc import Mapping

RAY = {
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # also the rate at which epochs are reported
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # epochs without an evaluation have no metric
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # the studies are the state: what Tune writes is read by nobody
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "120",  # in which a trial that was stopped early lets its process go
    "TUNE_MAX_PENDING_TRIALS_PG": "16",  # the pool limits what runs; one at a time would fill a cluster slowly
    "RAY_AIR_NEW_OUTPUT": "0",
}
_PASSED_ON = ("RAY_TRAIN_", "TUNE_FUNCTION_", "MLFLOW_", "ORCHESTRATOR_", "OPTUNA_", "AWS_", "TORCHINDUCTOR_")
# Ray shows and logs what is passed on, so secrets are not: nodes have them in their own environment.
_SECRET = ("PASSWORD", "SECRET", "TOKEN", "KEY", "CREDENTIAL", "USERNAME")


def passed_on_of(environment: Mapping[str, str]) -> dict[str, str]:
    """What of the driver's environment every node gets."""
    return {name: value for name, value in environment.items() if name.startswith(_PASSED_ON) and not is_secret(name)}


def is_secret(name: str) -> bool:
    """Whether an environment variable holds a secret, by its name.

    >>> is_secret("AWS_SECRET_ACCESS_KEY"), is_secret("AWS_ENDPOINT_URL")
    (True, False)
    """
    return any(word in name for word in _SECRET)
