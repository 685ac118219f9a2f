import hashlib

import pytest

from cl_bench.data.filelists import fingerprint, order_fingerprint, require_fingerprint, require_order


def test_the_order_of_a_list_does_not_matter_and_its_content_does() -> None:
    assert fingerprint(["b", "a"]) == fingerprint(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()
    assert fingerprint(["a", "c"]) != fingerprint(["a", "b"])


def test_another_list_is_refused_by_name() -> None:
    require_fingerprint("mine", ["a"], fingerprint(["a"]))
    with pytest.raises(ValueError, match="The list mine has the sha256"):
        require_fingerprint("mine", ["b"], fingerprint(["a"]))


def test_another_order_is_refused_where_it_matters() -> None:
    require_order("mine", ["b", "a"], order_fingerprint(["b", "a"]))
    with pytest.raises(ValueError, match="The list mine has the sha256"):
        require_order("mine", ["a", "b"], order_fingerprint(["b", "a"]))
