# Defines dualpipe::libtorch, LibTorch's CPU libraries as an imported target.
#
# find_package(Torch) with a CUDA wheel enables the CUDA language, wants nvcc, and probes GPUs. A CPU program needs none of that: two
# libraries and two include folders. Looked for, in this order:
#   1. the target `torch`, when a parent project has already found LibTorch
#   2. Torch_DIR, then CMAKE_PREFIX_PATH, each as a variable or from the environment
#   3. the places that the caller names, for us the PyPI wheel that scripts/setup puts into .venv
#
# Part of the installed package, which finds LibTorch by the same rules. As a script, `cmake [-D...] -P LibTorch.cmake` prints the folder
# that 2. finds, or nothing: so scripts/setup knows whether the wheel is needed.
include_guard(GLOBAL)

# Sets `out` to the folder of a LibTorch, to empty if there is none, and `problem` to what to tell the user then.
# Further arguments: patterns of folders to look in last.
function(dualpipe_libtorch_root out problem)
  set(${out} "" PARENT_SCOPE)
  set(${problem} "" PARENT_SCOPE)

  set(torch_dir "${Torch_DIR}")
  if(NOT torch_dir)
    set(torch_dir "$ENV{Torch_DIR}")
  endif()
  set(candidates "")
  if(torch_dir)
    get_filename_component(root "${torch_dir}/../../.." ABSOLUTE)
    list(APPEND candidates "${root}")
  endif()
  string(REPLACE ":" ";" from_environment "$ENV{CMAKE_PREFIX_PATH}")
  foreach(prefix IN LISTS CMAKE_PREFIX_PATH from_environment)
    # torch.utils.cmake_prefix_path is <libtorch>/share/cmake.
    get_filename_component(root "${prefix}/../.." ABSOLUTE)
    list(APPEND candidates "${prefix}" "${root}")
  endforeach()
  foreach(pattern IN LISTS ARGN)
    file(GLOB matches "${pattern}")
    list(APPEND candidates ${matches})
  endforeach()

  foreach(root IN LISTS candidates)
    if(EXISTS "${root}/lib/libtorch_cpu.so" AND EXISTS "${root}/include/ATen/core/Tensor.h")
      set(${out} "${root}" PARENT_SCOPE)
      return()
    endif()
    if(torch_dir)
      set(${problem} "Torch_DIR is ${torch_dir}, but ${root} holds no lib/libtorch_cpu.so with its headers." PARENT_SCOPE)
      return()
    endif()
  endforeach()
  list(APPEND candidates ${ARGN})
  list(JOIN candidates ", " looked)
  set(${problem} "LibTorch not found. Looked in: ${looked}.\nName one (2.11 to 2.15) by \
-DTorch_DIR=<libtorch>/share/cmake/Torch or -DCMAKE_PREFIX_PATH=<libtorch>; in a checkout, scripts/setup puts the PyPI wheel into .venv." PARENT_SCOPE)
endfunction()

# Sets `out` to the version that the headers state, e.g. 2.14.1, or to empty.
function(dualpipe_libtorch_version out root)
  set(${out} "" PARENT_SCOPE)
  foreach(header "torch/headeronly/version.h" "torch/csrc/api/include/torch/version.h")
    if(NOT EXISTS "${root}/include/${header}")
      continue()
    endif()
    set(numbers "")
    foreach(part MAJOR MINOR PATCH)
      file(STRINGS "${root}/include/${header}" line REGEX "define TORCH_VERSION_${part} +[0-9]+")
      if(line MATCHES "TORCH_VERSION_${part} +([0-9]+)")
        list(APPEND numbers "${CMAKE_MATCH_1}")
      endif()
    endforeach()
    list(LENGTH numbers count)
    if(count EQUAL 3)
      list(JOIN numbers "." version)
      set(${out} "${version}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()

function(_dualpipe_check_libtorch_version version)
  if(version AND (version VERSION_LESS 2.11 OR version VERSION_GREATER_EQUAL 2.16))
    message(WARNING "dualpipe is tested with LibTorch 2.11 to 2.15, this one is ${version}.")
  endif()
endfunction()

# LibTorch's libraries refer to those of the wheels beside it. Their own run paths find them, the linker needs telling. Options come before
# what find_package(Torch) adds, the folder of a CUDA toolkit, in which an older NCCL may lie.
function(_dualpipe_link_against_wheels root)
  file(GLOB folders LIST_DIRECTORIES true "${root}/../nvidia/*/lib")
  foreach(folder IN LISTS folders)
    file(REAL_PATH "${folder}" folder)
    target_link_options(dualpipe::libtorch INTERFACE "LINKER:-rpath-link,${folder}")
  endforeach()
endfunction()

# Defines dualpipe::libtorch, unless it exists. `problem` is set to empty, or to the reason why that was not possible.
# Further arguments: as for dualpipe_libtorch_root.
function(dualpipe_find_libtorch problem)
  set(${problem} "" PARENT_SCOPE)
  if(TARGET dualpipe::libtorch)
    return()
  endif()
  if(TARGET torch)
    add_library(dualpipe::libtorch INTERFACE IMPORTED GLOBAL)
    target_compile_features(dualpipe::libtorch INTERFACE cxx_std_20)
    get_target_property(includes torch INTERFACE_INCLUDE_DIRECTORIES)
    if(includes AND TARGET torch_cpu)
      # `torch` is all of LibTorch, CUDA included; torch_cpu is found by the same find_package(Torch).
      target_include_directories(dualpipe::libtorch SYSTEM INTERFACE ${includes})
      target_compile_options(dualpipe::libtorch INTERFACE $<TARGET_PROPERTY:torch,INTERFACE_COMPILE_OPTIONS>)
      target_link_libraries(dualpipe::libtorch INTERFACE torch_cpu c10)
      list(GET includes 0 root)
      get_filename_component(root "${root}/.." ABSOLUTE)
      _dualpipe_link_against_wheels("${root}")
    else()
      target_link_libraries(dualpipe::libtorch INTERFACE torch)
    endif()
    message(STATUS "dualpipe: LibTorch ${Torch_VERSION} from the target `torch`, which exists already")
    _dualpipe_check_libtorch_version("${Torch_VERSION}")
    return()
  endif()

  dualpipe_libtorch_root(root reason ${ARGN})
  if(NOT root)
    set(${problem} "${reason}" PARENT_SCOPE)
    return()
  endif()
  dualpipe_libtorch_version(version "${root}")
  message(STATUS "dualpipe: LibTorch ${version} in ${root}")
  _dualpipe_check_libtorch_version("${version}")

  foreach(library c10 torch_cpu)
    add_library(dualpipe::${library} SHARED IMPORTED GLOBAL)
    set_target_properties(dualpipe::${library} PROPERTIES IMPORTED_LOCATION "${root}/lib/lib${library}.so")
  endforeach()
  add_library(dualpipe::libtorch INTERFACE IMPORTED GLOBAL)
  target_include_directories(dualpipe::libtorch SYSTEM INTERFACE "${root}/include" "${root}/include/torch/csrc/api/include")
  target_link_libraries(dualpipe::libtorch INTERFACE dualpipe::torch_cpu dualpipe::c10)
  _dualpipe_link_against_wheels("${root}")
  target_compile_features(dualpipe::libtorch INTERFACE cxx_std_20)
endfunction()

if(CMAKE_SCRIPT_MODE_FILE STREQUAL CMAKE_CURRENT_LIST_FILE)
  dualpipe_libtorch_root(root problem)
  if(root)
    execute_process(COMMAND ${CMAKE_COMMAND} -E echo "${root}")
  elseif(problem MATCHES "^Torch_DIR")
    message(FATAL_ERROR "${problem}")
  endif()
endif()
