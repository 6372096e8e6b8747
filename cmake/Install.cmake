# Install rules and the CMake package. Three export sets, so that a program that only uses schedules needs no LibTorch:
#   find_package(dualpipe)                      dualpipe::dualpipe and all below it; finds LibTorch (see LibTorch.cmake)
#   find_package(dualpipe COMPONENTS nccl)      adds dualpipe::nccl, where it was built (see Nccl.cmake)
#   find_package(dualpipe COMPONENTS schedule)  dualpipe::schedule; standard library only
include(CMakePackageConfigHelpers)

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/dualpipe")

# dualpipe_package builds what is installed and nothing else. Nothing is installed before all of it is built, so that no half prefix remains.
set(installed dualpipe_schedule dualpipe_planner dualpipe_dualpipe)
foreach(target dualpipe_nccl dualpipe-plan dualpipe-run)
  if(TARGET ${target})
    list(APPEND installed ${target})
  endif()
endforeach()
add_custom_target(dualpipe_package DEPENDS ${installed})
list(TRANSFORM installed REPLACE "(.+)" "\"$<TARGET_FILE:\\1>\"" OUTPUT_VARIABLE files)
list(JOIN files " " files)
install(CODE "
  set(missing \"\")
  foreach(file ${files})
    if(NOT EXISTS \"\${file}\")
      string(APPEND missing \"\\n  \${file}\")
    endif()
  endforeach()
  if(missing)
    message(FATAL_ERROR \"Nothing is installed, since these are not built:\${missing}\\n\"
      \"Build them first: cmake --build \\\"${CMAKE_BINARY_DIR}\\\" --target dualpipe_package\")
  endif()")

install(TARGETS dualpipe_schedule dualpipe_planner EXPORT dualpipe-schedule ARCHIVE LIBRARY RUNTIME)
install(TARGETS dualpipe_dualpipe dualpipe_header_only EXPORT dualpipe-dualpipe ARCHIVE LIBRARY RUNTIME)
if(DUALPIPE_BUILD_TOOLS)
  install(TARGETS dualpipe-plan dualpipe-run RUNTIME)
endif()
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/dualpipe" TYPE INCLUDE FILES_MATCHING PATTERN "*.[hi]pp")
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" TYPE DOC)

set(components schedule dualpipe)
if(TARGET dualpipe_nccl)
  install(TARGETS dualpipe_nccl EXPORT dualpipe-nccl ARCHIVE LIBRARY RUNTIME)
  list(APPEND components nccl)
endif()
foreach(component IN LISTS components)
  install(EXPORT dualpipe-${component} NAMESPACE dualpipe:: FILE dualpipe-${component}-targets.cmake DESTINATION "${package_dir}")
endforeach()

# Where the package looks for LibTorch when its user names none: where this build found it.
set(DUALPIPE_BUILT_WITH_TORCH "")
get_target_property(location dualpipe::libtorch INTERFACE_INCLUDE_DIRECTORIES)
if(location)
  list(GET location 0 location)
  get_filename_component(DUALPIPE_BUILT_WITH_TORCH "${location}/.." ABSOLUTE)
endif()

configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/Config.cmake.in" "${PROJECT_BINARY_DIR}/dualpipeConfig.cmake"
  INSTALL_DESTINATION "${package_dir}" NO_SET_AND_CHECK_MACRO)
# Before 1.0 a minor version may change the interface.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/dualpipeConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/dualpipeConfig.cmake" "${PROJECT_BINARY_DIR}/dualpipeConfigVersion.cmake"
  "${PROJECT_SOURCE_DIR}/cmake/LibTorch.cmake" "${PROJECT_SOURCE_DIR}/cmake/Nccl.cmake" DESTINATION "${package_dir}")
