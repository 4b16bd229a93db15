"""Documents of the demo data set: documentation of Python 3.11.7, so that nothing has to be downloaded.

They lie beside this file as that Python's library held them (help topics, docstrings of each module), because
every other Python has other texts: the demo's data, and with them its digits, must not depend on the version.
They are sorted by a hash of their names, so that the first ones are a fair sample. Copyright (c) 2001-2023
Python Software Foundation, all rights reserved; under the license in `demo_license.txt`.
"""

import json
from pathlib import Path

from dataprep.reading import Document, Reader, make_document

DEMO_VAL_DOCS = 40  # about 110 kB
DEMO_VOCAB = 1024
DEMO_TEXTS = Path(__file__).with_name("demo.jsonl.xz")


def demo_documents() -> list[Document]:
    """The 500 documents, validation first; an origin is "help TOPIC" or "docstrings MODULE".

    Raises:
        DataError: the file of texts cannot be read.
    """
    records = [json.loads(line) for block in Reader([str(DEMO_TEXTS)]) for line in block.lines]
    return [make_document(record["text"], record["name"]) for record in records]
