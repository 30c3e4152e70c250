"""State purification: turning an observed state, shaped by what was popular, into one that says what a user likes.

Home of the Denoising State Representation Module of the paper (arXiv:2603.03820, section 4.1) and of the controls that
it must beat. Everything here will stand behind one ``Purifier`` protocol, so that agents do not know which one they are
given, and will run as an observation wrapper over single and batched environments. This release holds the environments
and the controls for agents; purifiers come in the next one.
"""
