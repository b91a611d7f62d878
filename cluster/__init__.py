"""What a cluster needs: DeepSpeed settings, manifests and job submission."""
