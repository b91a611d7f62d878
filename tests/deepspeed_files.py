"""DeepSpeed settings in the forms in which users of other trainers have them."""

AUTO = "auto"
BATCHES = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), AUTO
)
SCALING = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}
HALF = {"fp16": {"enabled": AUTO} | SCALING, "bf16": {"enabled": AUTO}}
ADAM = {"type": "AdamW", "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": AUTO, "warmup_max_lr": AUTO, "warmup_num_steps": AUTO}}
HOST = {"device": "cpu", "pin_memory": True}
BUCKETS = {"allgather_partitions": True, "allgather_bucket_size": 2e8, "reduce_scatter": True}
SIZES = dict.fromkeys(
    ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), AUTO
)
LIMITS = {"stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9}
GATHER = {"stage3_gather_16bit_weights_on_model_save": True}

FILES = {
    "transformers-zero2": {
        **BATCHES,
        **HALF,
        "optimizer": ADAM,
        "scheduler": WARMUP,
        "zero_optimization": {
            **BUCKETS,
            "stage": 2,
            "offload_optimizer": HOST,
            "overlap_comm": True,
            "reduce_bucket_size": 2e8,
            "contiguous_gradients": True,
        },
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    },
    "transformers-zero2-fixed": {
        "train_micro_batch_size_per_gpu": 64,
        "gradient_clipping": 0.3,
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16},
        "zero_optimization": {"stage": 2, "cpu_offload": False},
    },
    "transformers-zero3": {
        **BATCHES,
        **HALF,
        "optimizer": ADAM,
        "scheduler": WARMUP,
        "zero_optimization": {
            **SIZES,
            **LIMITS,
            **GATHER,
            "stage": 3,
            "offload_optimizer": HOST,
            "offload_param": HOST,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
        },
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    },
    "llama-factory-zero0": {
        **BATCHES,
        **HALF,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 0},
    },
    "llama-factory-zero2": {
        **BATCHES,
        **HALF,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            **BUCKETS,
            "stage": 2,
            "overlap_comm": False,
            "reduce_bucket_size": 5e8,
            "contiguous_gradients": True,
            "round_robin_gradients": True,
        },
        "comms_config": {"verbose": False},
        "monitor_config": {"enabled": True, "tag": "DeepSpeedMonitor", "csv_monitor": {"enabled": False}},
    },
    "llama-factory-zero3-offload": {
        **BATCHES,
        **HALF,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            **SIZES,
            **LIMITS,
            **GATHER,
            "stage": 3,
            "offload_optimizer": HOST,
            "offload_param": HOST,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
        },
    },
    "axolotl-zero1-compiled": {
        **BATCHES,
        "bf16": {"enabled": AUTO},
        "fp16": {"enabled": AUTO, "auto_cast": False} | SCALING,
        "zero_optimization": {"stage": 1, "overlap_comm": True},
        "compile": {"disable": False, "backend": "inductor"},
        "wall_clock_breakdown": False,
    },
    "axolotl-zero3-offload": {
        **BATCHES,
        "bf16": {"enabled": True},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            **SIZES,
            "stage": 3,
            "offload_optimizer": HOST,
            "offload_param": HOST,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 0,
            "max_live_parameters": 0,
            "max_reuse_distance": 0,
            "gather_16bit_weights_on_model_save": True,
        },
    },
}
