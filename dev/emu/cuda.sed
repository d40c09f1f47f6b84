# CUDA C++ -> C++, for the three things that headers cannot give. What escapes these patterns (a launch whose
# name and <<< are on two lines, a __shared__ of two lines or two variables) does not compile; none slips by.
#   kernel<T, N><<<grid, block, bytes, stream>>>(args)   a call of emu::launch, then of what that returns
s/([A-Za-z_][A-Za-z0-9_:]*(<([^<>;(){}]|<[^<>;(){}]*>)*>)?) *<<</emu::launch("\1", \1, /g
s/>>> *\(/)(/g
#   extern __shared__ T x[];    a pointer to the bytes that the launch asked for
s/extern +__shared__ +([^;]*[ *>)])([A-Za-z_][A-Za-z0-9_]*)\[\] *;/typedef \1\2_shared[]; EMU_DYNAMIC(\2);/
#   __shared__ T x[2][3];       a reference to memory that each block gets anew
s/__shared__ +([^;]*[ *>)])([A-Za-z_][A-Za-z0-9_]*)((\[[^];]*\])*) *;/typedef \1\2_shared\3; EMU_SHARED(\2);/
