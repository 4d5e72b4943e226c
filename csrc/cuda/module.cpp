// Python module `_C_cuda`: importing it runs the registrations of this library.
#include <Python.h>

#include "cuda/runtime.h"

// For tests, through ctypes: the cudaError that a launch answers on this machine, and what it means.
extern "C" __attribute__((visibility("default"))) int rmtkernels_cuda_probe_launch() {
  return rmtkernels::cuda_probe_launch();
}

extern "C" __attribute__((visibility("default"))) const char* rmtkernels_cuda_error_text(int error) {
  return rmtkernels::cuda_error_text(error);
}

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C_cuda(void) { return PyModule_Create(&module); }
