# The compiler that we need, and ccache where it is installed. Neither is imposed on a parent project's own choice of launcher.
include_guard(GLOBAL)

if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 12
    OR CMAKE_CXX_COMPILER_ID STREQUAL "Clang" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 14)
  message(FATAL_ERROR "dualpipe needs g++ 12 or clang 14 or later, this is ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} "
    "(${CMAKE_CXX_COMPILER}). Choose another by -DCMAKE_CXX_COMPILER or the variable CXX.")
endif()

if(PROJECT_IS_TOP_LEVEL AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  find_program(DUALPIPE_CCACHE ccache)
  mark_as_advanced(DUALPIPE_CCACHE)
  if(DUALPIPE_CCACHE)
    # ccache takes precompiled headers only when told that their macros and times may be trusted, and g++ must leave their use visible
    # in the preprocessed text.
    set(CMAKE_CXX_COMPILER_LAUNCHER
      env "CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime" "${DUALPIPE_CCACHE}")
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      add_compile_options(-fpch-preprocess)
    endif()
  endif()
endif()
