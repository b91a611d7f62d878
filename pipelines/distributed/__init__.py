"""DeepSpeed and process groups: engines, whole optimizer state of any ZeRO stage, settings."""
