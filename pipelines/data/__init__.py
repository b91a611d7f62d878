"""Rows from any source, kinds of task, token ids."""

import os

# before `datasets` is imported: reading a local file must not ask the hub, which takes seconds without a network
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
