"""Checks and estimates before training: data, model, memory, cost, hub, machine."""
