"""DeepSpeed and process groups: engines, settings, and optimizer state independent of the ZeRO stage."""
