# How our own targets are made.
include_guard(GLOBAL)

# Warnings are errors, on our own targets only.
function(dualpipe_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual -Werror)
endfunction()

# dualpipe_library(name sources...): library dualpipe_<name>, alias dualpipe::<name>
function(dualpipe_library name)
  add_library(dualpipe_${name} ${ARGN})
  add_library(dualpipe::${name} ALIAS dualpipe_${name})
  set_target_properties(dualpipe_${name} PROPERTIES EXPORT_NAME ${name} POSITION_INDEPENDENT_CODE ON)
  target_compile_features(dualpipe_${name} PUBLIC cxx_std_20)
  target_include_directories(dualpipe_${name} PUBLIC
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
    $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  target_include_directories(dualpipe_${name} PRIVATE ${PROJECT_SOURCE_DIR}/src)
  dualpipe_warnings(dualpipe_${name})
endfunction()

# dualpipe_asio(target): Asio chooses how to allocate by the headers that a file includes before it. All files of a program must choose the same.
function(dualpipe_asio target)
  target_include_directories(${target} SYSTEM PRIVATE ${DUALPIPE_ASIO_INCLUDE})
  target_compile_definitions(${target} PRIVATE ASIO_HAS_STD_ALIGNED_ALLOC)
endfunction()

# dualpipe_unity(target size alone...): compiles up to `size` of its source files as one; `alone` are large enough by themselves.
function(dualpipe_unity target size)
  if(NOT DUALPIPE_UNITY)
    return()
  endif()
  set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE ${size})
  set_source_files_properties(${ARGN} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
endfunction()
