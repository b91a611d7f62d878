"""The system around `curlora`: chains of fine-tunes on Ray, their evaluation, lineage, promotion and command line.

Packages import only what stands left of them (`tests/unit/test_imports.py` enforces it):

    errors, metrics < config < distributed, runs < data < models < preflight, bases, lineage, evaluation, training
            < reporting < workers, promotion, inference < search, serve < chain < comparison < cli  (demo: errors only)
"""
