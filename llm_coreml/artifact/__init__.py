"""Files as data: containers, method plans, programs and weights are read here, and nothing runs.

In come paths and bytes that nobody vouches for; out go plain dataclasses, every size of which was
held against the file or the machine. Whatever cannot be read is an `ArtifactError`. Of the
package only the errors and how much memory the machine has are known here: what executes, shows or
measures a file stands on this room, and is not seen from it. Nothing is written.
"""
