import hashlib

import pytest

from cl_bench.filelists import fingerprint, require_fingerprint


def test_the_order_of_a_list_does_not_matter_and_its_content_does() -> None:
    assert fingerprint(["b", "a"]) == fingerprint(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()
    assert fingerprint(["a", "c"]) != fingerprint(["a", "b"])


def test_another_list_is_refused_by_name() -> None:
    require_fingerprint("mine", ["a"], fingerprint(["a"]))
    with pytest.raises(ValueError, match="The list mine has the sha256"):
        require_fingerprint("mine", ["b"], fingerprint(["a"]))
