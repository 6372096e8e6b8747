# Two files that include everything are compiled with the bodies in the headers, by -I include and LibTorch alone, linked, and run; the first is
# compiled against the library as well, to compare the time.
#   cmake -DCOMPILER= -DFLAGS= -DINCLUDE= -DTORCH_INCLUDES= -DTORCH_LIBRARIES= -DFIRST= -DSECOND= -DOUT= -P header_only.cmake
file(MAKE_DIRECTORY "${OUT}")
separate_arguments(flags UNIX_COMMAND "${FLAGS}")
set(torch "")
foreach(folder IN LISTS TORCH_INCLUDES)
  list(APPEND torch -isystem "${folder}")
endforeach()

function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

function(compile source object define)
  string(TIMESTAMP begin "%s%f")
  run("${COMPILER}" -std=c++20 -O0 -Wall -Wextra -Wshadow -Werror ${flags} ${define} "-I${INCLUDE}" ${torch} -c "${source}" -o "${OUT}/${object}")
  string(TIMESTAMP end "%s%f")
  math(EXPR seconds "(${end} - ${begin}) / 1000000")
  message(STATUS "compiled in ${seconds} s: ${object}")
endfunction()

compile("${FIRST}" header_only_first.o -DDUALPIPE_HEADER_ONLY)
compile("${SECOND}" header_only_second.o -DDUALPIPE_HEADER_ONLY)
compile("${FIRST}" against_library.o -DDUALPIPE_COMPILED)

set(links "")
foreach(library IN LISTS TORCH_LIBRARIES)
  get_filename_component(folder "${library}" DIRECTORY)
  list(APPEND links "${library}" "-Wl,-rpath,${folder}")
endforeach()
run("${COMPILER}" ${flags} "${OUT}/header_only_first.o" "${OUT}/header_only_second.o" ${links} ${LINK_OPTIONS} -pthread -o "${OUT}/header_only")
run("${OUT}/header_only")
