# What is installed is known before it is built: an installation of a build tree that lacks it leaves no half prefix, and dualpipe_package,
# which scripts/demo builds, makes all of it.
#
#   cmake -DSOURCE=… -DBUILD=… -DGENERATOR=… -DOPTIONS=… -P unbuilt.cmake
file(REMOVE_RECURSE "${BUILD}")
execute_process(COMMAND ${CMAKE_COMMAND} -S "${SOURCE}" -B "${BUILD}" -G "${GENERATOR}" ${OPTIONS}
  -DDUALPIPE_BUILD_TESTS=OFF -DDUALPIPE_BUILD_EXAMPLES=OFF -DDUALPIPE_BUILD_BENCHMARKS=OFF
  OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${CMAKE_COMMAND} --install "${BUILD}" --prefix "${BUILD}/prefix"
  OUTPUT_QUIET ERROR_VARIABLE error RESULT_VARIABLE status)
if(status EQUAL 0 OR NOT error MATCHES "Nothing is installed" OR EXISTS "${BUILD}/prefix")
  message(FATAL_ERROR "an installation of nothing ended with ${status} and printed:\n${error}")
endif()

if(GENERATOR STREQUAL "Ninja")
  string(REGEX MATCHALL "(lib|bin/)dualpipe[-_a-z]+[.a-z]*\n" files "${error}")
  list(LENGTH files count)
  if(count LESS 5)
    message(FATAL_ERROR "${count} files are named as missing, of three libraries and two tools:\n${error}")
  endif()
  execute_process(COMMAND ${CMAKE_COMMAND} --build "${BUILD}" --target dualpipe_package -- -n
    OUTPUT_VARIABLE plan COMMAND_ERROR_IS_FATAL ANY)
  foreach(file IN LISTS files)
    if(NOT plan MATCHES "Linking [^\n]* ${file}")
      message(FATAL_ERROR "dualpipe_package does not build ${file}")
    endif()
  endforeach()
endif()
