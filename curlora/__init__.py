"""CURLoRA on PEFT."""
