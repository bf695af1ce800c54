"""widehead/commands -- one module a command of `widehead.cli`."""
