"""Parts of a layer recorded once and replayed: at short context a step waits for the CPU that submits its parts."""
