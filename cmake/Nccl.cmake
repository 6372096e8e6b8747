# Defines dualpipe::cuda, what a program with GPU ranks links beside dualpipe::libtorch: LibTorch's CUDA libraries, NCCL and the CUDA runtime,
# from the wheels that LibTorch itself is pinned to. Needs neither nvcc nor a CUDA toolkit. Call after dualpipe_find_libtorch.
#
# Part of the installed package.
include_guard(GLOBAL)

# `problem` is set to empty, or to the reason why that was not possible.
function(dualpipe_find_nccl problem)
  set(${problem} "" PARENT_SCOPE)
  if(TARGET dualpipe::cuda)
    return()
  endif()

  get_target_property(root dualpipe::libtorch INTERFACE_INCLUDE_DIRECTORIES)
  if(NOT root)
    get_target_property(root torch INTERFACE_INCLUDE_DIRECTORIES)
  endif()
  list(GET root 0 root)
  get_filename_component(root "${root}/.." ABSOLUTE)
  get_filename_component(site "${root}/.." ABSOLUTE)
  if(NOT EXISTS "${root}/lib/libtorch_cuda.so")
    set(${problem} "LibTorch in ${root} is a build for the CPU: there is no lib/libtorch_cuda.so" PARENT_SCOPE)
    return()
  endif()
  if(EXISTS "${site}/nvidia")
    # Its libraries may come later: a build that uses this looks again then.
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${site}/nvidia")
    if(NOT EXISTS "${site}/nvidia/nccl")
      set(${problem} "${site}/nvidia holds only what LibTorch needs on the CPU. In a checkout, scripts/setup adds the rest; elsewhere \
pip install --upgrade torch, with its dependencies" PARENT_SCOPE)
      return()
    endif()
  endif()

  # Beside the wheel; for another LibTorch, where the user's variables or the system have them.
  file(GLOB cuda_folders LIST_DIRECTORIES true "${site}/nvidia/cu[0-9]*" "${site}/nvidia/cuda_runtime" "${root}")
  find_path(DUALPIPE_NCCL_INCLUDE nccl.h HINTS "${site}/nvidia/nccl/include" "$ENV{NCCL_HOME}/include" NO_CMAKE_SYSTEM_PATH)
  find_path(DUALPIPE_NCCL_INCLUDE nccl.h)
  find_path(DUALPIPE_CUDA_INCLUDE cuda_runtime_api.h HINTS ${cuda_folders} "$ENV{CUDA_HOME}" PATH_SUFFIXES include
    NO_CMAKE_SYSTEM_PATH)
  find_path(DUALPIPE_CUDA_INCLUDE cuda_runtime_api.h HINTS /usr/local/cuda PATH_SUFFIXES include)
  find_path(DUALPIPE_NVTX_INCLUDE nvtx3/nvToolsExt.h HINTS "${DUALPIPE_CUDA_INCLUDE}" "${site}/nvidia/nvtx/include")
  find_library(DUALPIPE_NCCL_LIBRARY NAMES libnccl.so.2 nccl HINTS "${DUALPIPE_NCCL_INCLUDE}/../lib" NO_CMAKE_SYSTEM_PATH)
  find_library(DUALPIPE_NCCL_LIBRARY NAMES libnccl.so.2 nccl)
  find_library(DUALPIPE_CUDART_LIBRARY NAMES libcudart.so.13 libcudart.so.12 cudart
    HINTS "${DUALPIPE_CUDA_INCLUDE}/../lib" "${DUALPIPE_CUDA_INCLUDE}/../lib64" NO_CMAKE_SYSTEM_PATH)
  find_library(DUALPIPE_CUDART_LIBRARY NAMES libcudart.so.13 libcudart.so.12 cudart)
  mark_as_advanced(DUALPIPE_NCCL_INCLUDE DUALPIPE_CUDA_INCLUDE DUALPIPE_NVTX_INCLUDE DUALPIPE_NCCL_LIBRARY DUALPIPE_CUDART_LIBRARY)
  foreach(wanted NCCL_INCLUDE CUDA_INCLUDE NVTX_INCLUDE NCCL_LIBRARY CUDART_LIBRARY)
    if(NOT DUALPIPE_${wanted})
      set(${problem} "not found: the file for DUALPIPE_${wanted}. The torch wheel for CUDA brings NCCL and the CUDA runtime in \
${site}/nvidia; elsewhere set NCCL_HOME and CUDA_HOME, or -DDUALPIPE_${wanted}=…" PARENT_SCOPE)
      return()
    endif()
  endforeach()

  foreach(library c10_cuda torch_cuda)
    add_library(dualpipe::${library} SHARED IMPORTED GLOBAL)
    set_target_properties(dualpipe::${library} PROPERTIES IMPORTED_LOCATION "${root}/lib/lib${library}.so")
  endforeach()
  add_library(dualpipe::cuda INTERFACE IMPORTED GLOBAL)
  target_include_directories(dualpipe::cuda SYSTEM INTERFACE
    "${DUALPIPE_NCCL_INCLUDE}" "${DUALPIPE_CUDA_INCLUDE}" "${DUALPIPE_NVTX_INCLUDE}")
  # The wheels' own files come first, so that no toolkit's older NCCL is found before them. Nothing refers to libtorch_cuda by name.
  target_link_libraries(dualpipe::cuda INTERFACE "${DUALPIPE_NCCL_LIBRARY}" "${DUALPIPE_CUDART_LIBRARY}"
    -Wl,--push-state,--no-as-needed dualpipe::torch_cuda -Wl,--pop-state dualpipe::c10_cuda ${CMAKE_DL_LIBS})
  message(STATUS "dualpipe: NCCL in ${DUALPIPE_NCCL_LIBRARY}")
endfunction()
