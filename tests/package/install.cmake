# Installs BUILD into an empty PREFIX.
file(REMOVE_RECURSE "${PREFIX}")
execute_process(COMMAND ${CMAKE_COMMAND} --install "${BUILD}" --prefix "${PREFIX}" OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)

# The installed programs run.
foreach(program dualpipe-plan dualpipe-run)
  execute_process(COMMAND "${PREFIX}/bin/${program}" --help OUTPUT_VARIABLE help RESULT_VARIABLE status)
  if(NOT status EQUAL 0 OR NOT help MATCHES "${program}")
    message(FATAL_ERROR "${PREFIX}/bin/${program} --help ended with ${status} and printed:\n${help}")
  endif()
endforeach()

# Nothing of what is installed refers to the source or build folder, and none of our private dependencies is asked of consumers.
file(GLOB_RECURSE files "${PREFIX}/*.cmake")
foreach(file IN LISTS files)
  file(STRINGS "${file}" bad REGEX "${BUILD}/|nlohmann|asio|CLI11")
  if(bad)
    message(FATAL_ERROR "${file} refers to what a consumer does not have:\n${bad}")
  endif()
endforeach()
