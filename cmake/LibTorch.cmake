# Defines dualpipe::libtorch, LibTorch's CPU libraries as an imported target.
#
# find_package(Torch) with a CUDA wheel enables the CUDA language, wants nvcc, and probes GPUs. A CPU program needs none of that: two libraries
# and two include folders. Looked for, in this order:
#   1. the target `torch`, when a parent project has already found LibTorch
#   2. Torch_DIR or CMAKE_PREFIX_PATH
#   3. DUALPIPE_VENV/lib/python*/site-packages/torch, the PyPI wheel (scripts/setup puts it into .venv)
include_guard(GLOBAL)

set(DUALPIPE_TORCH_VERSIONS "2.11 to 2.15")

function(dualpipe_find_libtorch venv)
  if(TARGET dualpipe::libtorch)
    return()
  endif()
  if(TARGET torch)
    add_library(dualpipe::libtorch INTERFACE IMPORTED GLOBAL)
    target_link_libraries(dualpipe::libtorch INTERFACE torch)
    message(STATUS "dualpipe: LibTorch from the parent project's target `torch`")
    return()
  endif()

  set(candidates "")
  if(Torch_DIR)
    get_filename_component(root "${Torch_DIR}/../../.." ABSOLUTE)
    list(APPEND candidates "${root}")
  endif()
  set(prefixes ${CMAKE_PREFIX_PATH})
  if(DEFINED ENV{CMAKE_PREFIX_PATH})
    string(REPLACE ":" ";" from_environment "$ENV{CMAKE_PREFIX_PATH}")
    list(APPEND prefixes ${from_environment})
  endif()
  list(APPEND candidates ${prefixes})
  file(GLOB wheels "${venv}/lib/python3*/site-packages/torch")
  list(APPEND candidates ${wheels})

  foreach(root IN LISTS candidates)
    if(EXISTS "${root}/lib/libtorch_cpu.so" AND EXISTS "${root}/include/ATen/core/Tensor.h")
      set(found "${root}")
      break()
    endif()
  endforeach()
  if(NOT found)
    message(FATAL_ERROR
      "LibTorch not found. Looked in: ${candidates}\n"
      "Run scripts/setup, which puts the PyPI wheel into .venv, or name an existing LibTorch (${DUALPIPE_TORCH_VERSIONS}) by "
      "-DTorch_DIR=<libtorch>/share/cmake/Torch or -DCMAKE_PREFIX_PATH=<libtorch>.")
  endif()

  set(version "unknown")
  if(EXISTS "${found}/include/torch/headeronly/version.h")
    set(version_header "${found}/include/torch/headeronly/version.h")
  else()
    set(version_header "${found}/include/torch/csrc/api/include/torch/version.h")
  endif()
  if(EXISTS "${version_header}")
    file(STRINGS "${version_header}" version_line REGEX "define TORCH_VERSION \"")
    string(REGEX REPLACE ".*\"([^\"]+)\".*" "\\1" version "${version_line}")
  endif()
  message(STATUS "dualpipe: LibTorch ${version} in ${found}")
  set(DUALPIPE_TORCH_ROOT "${found}" PARENT_SCOPE)

  # The wheel's libraries refer to libcupti and libcudart of the wheels beside it; their own run paths find them, the linker needs telling.
  get_filename_component(site "${found}/.." ABSOLUTE)
  file(GLOB cuda_libraries LIST_DIRECTORIES true "${site}/nvidia/cu*/lib" "${site}/nvidia/cuda_runtime/lib" "${site}/nvidia/cuda_cupti/lib")
  set(link_options "")
  foreach(folder IN LISTS cuda_libraries)
    list(APPEND link_options "LINKER:-rpath-link,${folder}")
  endforeach()

  foreach(library c10 torch_cpu)
    add_library(dualpipe::${library} SHARED IMPORTED GLOBAL)
    set_target_properties(dualpipe::${library} PROPERTIES IMPORTED_LOCATION "${found}/lib/lib${library}.so")
  endforeach()
  add_library(dualpipe::libtorch INTERFACE IMPORTED GLOBAL)
  target_include_directories(dualpipe::libtorch SYSTEM INTERFACE "${found}/include" "${found}/include/torch/csrc/api/include")
  target_link_libraries(dualpipe::libtorch INTERFACE dualpipe::torch_cpu dualpipe::c10)
  target_link_options(dualpipe::libtorch INTERFACE ${link_options})
  target_compile_features(dualpipe::libtorch INTERFACE cxx_std_20)
endfunction()
