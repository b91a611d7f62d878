"""Sources, kinds of task, tokens."""

import os

# before `datasets` is imported: reading a local file must not ask the hub, which takes seconds where there is none
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
