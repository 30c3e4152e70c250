"""Agents, method zoo, studies and the command line, on top of the environments and purifiers."""
