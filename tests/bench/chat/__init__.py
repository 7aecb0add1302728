"""How the built-in chat data set was made: its words, its phrases, its rows.

No request is in two of the five splits, even if case, spaces and marks are disregarded:

    train              as data is found: imbalance of 20 to 1, typos, and planted faults
    dev                drawn like train, without the faults: for choosing
    test_values        requests of train; like the next two with new values, every intent as often
    test_combinations  new combinations of a core and clauses that train has
    test_wording       new wording

A row is a dict:

    id, intent   e.g. train-0042, and the answer's intent; `slots`: its values by name
    messages     request and answer, [{"role": "user", "content": ...}, {"role": "assistant", ...}]
    phrasing     the request without its values; `combination`: its core and clauses (parts of it)
    typo         whether a word of the request is misspelt, never one of a slot
    fault        None, or what was planted: {"kind": ...} and its form, its truth or the twin's id
    rejected     of a row without a fault, a wrong answer; `corruption`: what is wrong with it
"""
