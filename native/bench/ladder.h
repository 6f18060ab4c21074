// Two products of the demo model from the plain loop to the kernel that is used, each rung checked before it is timed.
#pragma once

// Prints both tables, one thread; returns the process's exit code.
int run_ladders();
