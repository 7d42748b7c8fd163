"""The demo as a Space: the embedded model, for whoever comes."""

import os

from sdguard.demo.app import serve

if __name__ == "__main__":
    # a Space, which is reached through its hub and shown inside its page; anywhere else this machine alone gets in
    serve(host="0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1", port=7860, frames="'self' https://huggingface.co")
