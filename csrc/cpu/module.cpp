// Python module `_C`: importing it runs the registrations of this library. It also says which instruction set is in
// use.
#include <Python.h>

#include <initializer_list>

#include "cpu/kernels.h"

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(rmtkernels::cpu_isa()); }

PyObject* cpu_isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const char* name : {"avx2", "baseline"}) {
    if (!names || !rmtkernels::cpu_isa_available(name)) continue;
    PyObject* text = PyUnicode_FromString(name);
    if (!text || PyList_Append(names, text) < 0) Py_CLEAR(names);
    Py_XDECREF(text);
  }
  return names;
}

PyObject* set_cpu_isa(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const bool known = rmtkernels::set_cpu_isa(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  return PyBool_FromLong(known);
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "Instruction set in use."},
    {"cpu_isas", cpu_isas, METH_NOARGS, "Instruction sets that were built and that this processor has, best first."},
    {"set_cpu_isa", set_cpu_isa, METH_O,
     "Use 'avx2', 'baseline' or the best ('auto'); False if there is no such set here."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
