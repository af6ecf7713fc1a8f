"""The mark of a process that the command `depthmix` has started, and nobody else.

`import depthmix` makes PEFT know the method, which takes seconds. In a process with this mark it
leaves that to the room `adapters`, which does the same as soon as anything of it is imported: so
what reads numbers alone, as `depthmix compare` does, never waits for torch.
"""
