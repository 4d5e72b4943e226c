// What every CUDA binding needs to know of the CUDA runtime, without a CUDA header.
#pragma once

namespace rmtkernels {

// The runtime's words for an error that a launcher returned.
const char* cuda_error_text(int error);

// Launches an empty kernel on the current device and returns the error, 0 if there is none. Without a GPU or with one
// that this binary has no code for, it says so; nothing is written and nothing is waited for.
int cuda_probe_launch();

}  // namespace rmtkernels
