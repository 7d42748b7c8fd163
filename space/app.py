"""The demo as a Space: the embedded model, for whoever comes."""

from sdguard.demo.app import serve

if __name__ == "__main__":
    # a Space is shown inside the page of its hub, and has no log-in that another site could misuse
    serve(host="0.0.0.0", port=7860, frames="*")
