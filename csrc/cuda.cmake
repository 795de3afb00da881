# The CUDA half, by nvcc directly: enabling CMake's CUDA language would make a broken toolkit fatal.
find_program(LOWRANK_OPTIM_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin
             PATHS /usr/local/cuda/bin)
if(NOT LOWRANK_OPTIM_NVCC)
  message(STATUS "lowrank_optim: no nvcc, building without the CUDA half")
  return()
endif()

set(CUDA_SOURCES update.cu block.cu matrix.cu)
set(CUDA_LIBRARY ${CMAKE_CURRENT_BINARY_DIR}/liblowrank_optim_cuda.so)
execute_process(COMMAND ${LOWRANK_OPTIM_NVCC} --list-gpu-arch OUTPUT_VARIABLE KNOWN
                ERROR_QUIET RESULT_VARIABLE FAILED)
set(CODES "")
foreach(arch 75 80 86 89 90 100 120)
  if(KNOWN MATCHES "compute_${arch}\n")
    list(APPEND CODES -gencode=arch=compute_${arch},code=sm_${arch})
    set(NEWEST ${arch})
  endif()
endforeach()
if(FAILED OR NOT CODES)
  message(WARNING "lowrank_optim: ${LOWRANK_OPTIM_NVCC} does not work, building without CUDA")
  return()
endif()
list(APPEND CODES -gencode=arch=compute_${NEWEST},code=compute_${NEWEST})

list(TRANSFORM CUDA_SOURCES PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/)
file(GLOB CUDA_HEADERS ${CMAKE_CURRENT_SOURCE_DIR}/*.h ${CMAKE_CURRENT_SOURCE_DIR}/*.cuh)
set(CUDA_COMMAND
    ${LOWRANK_OPTIM_NVCC} -shared -O3 -std=c++17 -fmad=false --threads=0 -cudart=static
    -Xcompiler=-fPIC,-fvisibility=hidden ${CODES} -o ${CUDA_LIBRARY} ${CUDA_SOURCES})
add_custom_command(
  OUTPUT ${CUDA_LIBRARY}
  COMMAND ${CUDA_COMMAND} || ${CMAKE_COMMAND} -E echo
          "lowrank_optim: the CUDA half failed to build, the CPU half is installed without it"
  DEPENDS ${CUDA_SOURCES} ${CUDA_HEADERS}
  VERBATIM)
add_custom_target(lowrank_optim_cuda ALL DEPENDS ${CUDA_LIBRARY})
install(FILES ${CUDA_LIBRARY} DESTINATION lowrank_optim/_native OPTIONAL)
