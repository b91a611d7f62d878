"""Chains on a Ray cluster: jobs, the inbox of new domains, the schedule, DeepSpeed settings and manifests."""
