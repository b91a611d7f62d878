"""What runs on Ray workers, and how the driver supervises it."""
